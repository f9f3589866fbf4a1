"""Published checkpoint layouts, reading, writing, conversion and inspection."""
