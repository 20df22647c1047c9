"""What timm's classes compute, in pieces between which tokens can change."""
