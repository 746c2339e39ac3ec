"""Where adapters come from: addresses, credentials, and getting what lies there into the store."""
