"""The tensor stream: headers, checkpoints, layouts, roles, and the sink that writes."""
