"""A first sample sheet from a folder of slides: snakemake write_sheet --cores 1 --config slides_folder=DIR sheet=NEW.csv"""


rule write_sheet:
    """Lists the slides of a folder, with what their files tell. The sheet is no declared output, because Snakemake
    deletes those before it makes them again: a sheet that somebody has filled in must never be lost.
    """
    log:
        log_file("write_sheet"),
    localrule: True
    conda:
        "../envs/slidemake.yaml"
    params:
        folder=CONFIG["slides_folder"],
        sheet=CONFIG["sheet"],
    message:
        "Writing a first sample sheet, {params.sheet}, of the slides in {params.folder}"
    script:
        "../scripts/write_sheet.py"
