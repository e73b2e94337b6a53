"""Offline commands, one thin file each; what they do lives in megagpt/."""
