"""One description of the wire, for both ends: messages, how keys and vectors look in JSON, and how long a silent peer is kept."""
