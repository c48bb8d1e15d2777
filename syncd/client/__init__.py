"""What asks a running syncd: the blocking and the asynchronous client, over one description of the calls."""
