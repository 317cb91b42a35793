"""One HTML page of runs and evaluations that people open: what is read, what is shown, and what is sent to browsers."""
