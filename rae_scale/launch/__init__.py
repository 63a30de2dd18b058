"""Start a rae-scale command on one machine or many, and keep it running. No torch here: launching takes no second."""
