"""Pictures of what became of an image's patches: followed, drawn, put on sheets and pages."""
