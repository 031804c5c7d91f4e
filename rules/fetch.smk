"""Slides that the sheet gives as an address (s3://, https://): fetched rack by rack, and dropped when they are done with.

Only when there are such slides. No address is an input of a rule, so planning asks nothing of the network. A rack is
fetched when the one `racks_on_disk` before it has been released, which bounds what is on the disk.
"""

RACK_NAMES = list(RACKS)
REMOTE_RACKS = {
    rack: place for place, rack in enumerate(RACKS) if PLAN.remote_rows(rack)
}


def fetched_slides(wildcards):
    """The folder with the slides of a rack, where there is something to fetch."""
    return (
        f"{OUTPUT}/fetched/{wildcards.rack}" if wildcards.rack in REMOTE_RACKS else []
    )


def place_on_disk(wildcards):
    """That an earlier rack has left the disk. Not `ancient`, although it says when to fetch and nothing about what:
    Snakemake then passes over changes of racks behind one that runs. They are looked at instead, which fetches nothing.
    """
    place = REMOTE_RACKS[wildcards.rack] - PLAN.racks_on_disk
    return f"{OUTPUT}/fetched/released/{RACK_NAMES[place]}" if place >= 0 else []


def users_of_slides(wildcards):
    """The last stages that read the slides of a rack."""
    rack = wildcards.rack
    stages = [
        manifest("stain", rack),
        *[manifest("tiles", rack, grid=g) for g in GRIDS],
    ]
    if CONFIG["tiling"]["store"] == "coords":
        stages += [manifest("embed", rack, encoder=encoder) for encoder in ENCODERS]
    stages += [
        manifest("background", rack, encoder=e) for e in PLAN.background_encoders()
    ]
    return stages


if REMOTE_RACKS:

    rule fetch_slides:
        """Slides of a rack from where they are stored, each checked; one that cannot be fetched is a failure record."""
        input:
            place_on_disk,
        output:
            slides=temp(directory(f"{OUTPUT}/fetched/{{rack}}")),
        log:
            log_file("fetch_slides/{rack}"),
        benchmark:
            benchmark_file("fetch_slides/{rack}")
        threads: 1
        resources:
            mem_mb=growing(1000),
            runtime=minutes(20, per_slide=10),
        params:
            results=OUTPUT,
            rows=lambda wildcards: PLAN.remote_rows(wildcards.rack),
            fetching=CONFIG["remote"],
            version=STAGE_VERSIONS["fetch"],
        message:
            "Fetching the slides of rack {wildcards.rack}"
        script:
            "../scripts/fetch_slides.py"

    rule release_slides:
        """A rack's slides are done with: another rack may be fetched."""
        input:
            users_of_slides,
        output:
            touch(f"{OUTPUT}/fetched/released/{{rack}}"),
        log:
            log_file("release_slides/{rack}"),
        localrule: True
        message:
            "The slides of rack {wildcards.rack} may leave the disk"
        shell:
            "true 2> {log:q}"
