"""Speed, measured so as to be believed: the same work, in one process, in turn, medians with their spread."""
