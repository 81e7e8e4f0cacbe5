"""Make pictures and HTML pages about runs: curves, interactive charts, the page that holds them."""
