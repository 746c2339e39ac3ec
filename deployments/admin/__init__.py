"""A running application's admin API from the command line: its client, what is told, and how it is shown."""
