"""The posterior downstream: samplers and averaging (not built yet; see CHANGELOG.md)."""
