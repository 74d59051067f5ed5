"""Where priors live: upload to and download from the Hub, and the model card."""
