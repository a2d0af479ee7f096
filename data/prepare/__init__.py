"""Text and token files to shards, once; everything else reads the shards."""
