"""How bytes travel between ranks, one transport a file."""
