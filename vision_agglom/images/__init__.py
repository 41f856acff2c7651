"""From shards and folders to batches of square images, each decided by one global sample index; mosaics; scenes with known labels."""
