"""``coldforge evaluate``: from the path of a network or a file to a record of what it withstands.

:mod:`request` is what the command may be told, :mod:`subject` what a path names, loaded, and :mod:`job` the evaluation
itself, resumable, with the folder it leaves. Nothing heavy is imported here.
"""
