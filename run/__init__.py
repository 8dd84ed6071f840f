"""What exists because runs are long, flags are many and files are foreign; it does not know the method."""
