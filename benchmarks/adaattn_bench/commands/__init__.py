"""The commands: options in, files and tables out."""
