"""The blocking and the asynchronous client, built on one description of the calls."""
