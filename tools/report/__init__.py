"""One HTML page of what run directories hold."""
