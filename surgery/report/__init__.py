"""Reports for people: the HTML page and the figures in it."""
