"""What ``adapter-router`` can be told to do, a file a command."""
