"""The datasets by name, their states, the counters and the alerts. Any part may read them."""
