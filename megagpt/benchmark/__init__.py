"""This project's speed, measured side by side with its peers or with a plain alternative, in turns."""
