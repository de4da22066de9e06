"""From a run to what people read: tables, plots, and a page that holds both."""
