"""The fleet: its proxy's configuration, and the Compose file's own commands as processes of this machine."""
