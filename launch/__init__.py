"""What starts training processes, and how a process finds out which one it is."""
