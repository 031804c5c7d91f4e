"""A file or an address in, pixels at a place and resolution out.

In reading order: files (is it a file at all?), reader (what a slide is), opening (who opens it), screening (the first
stage), first_sheet (a sheet of a folder of slides), remote (slides at an address), remote_http, remote_access. How each
format is read: the package `formats`.
"""
