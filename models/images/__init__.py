"""From files, arrays and URLs to pixels."""
