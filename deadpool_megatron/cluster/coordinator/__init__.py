"""The coordinator's process: sockets, clock, files, what it keeps."""
