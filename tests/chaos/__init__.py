"""Load that never stops, a history of every request, and the processes to kill."""
