"""Facts about ml."""
