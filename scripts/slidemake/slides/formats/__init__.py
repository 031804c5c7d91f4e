"""One file a library or format: what is special about it ends here.

In reading order: openslide_reader, vips_reader, array_reader (what libraries that hand out arrays share),
tifffile_reader, tiatoolbox_reader, tiff_index (IFDs without a pixel), jpeg_tiles (stored JPEGs as they are), ome_xml,
dicom_files, levels (do the levels of a pyramid agree?).
"""
