"""A run in a browser: the page that a server shows, and the report that is one file."""
