"""What training costs: device peaks, memory and time."""
