"""Many jobs from a manifest, by one process or several, in one folder."""
