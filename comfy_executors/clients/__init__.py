"""Raw protocols, one file a service; they know nothing of executors."""
