"""The stages of a run: supervised (SFT, reward model), PPO, and the quickstart that chains them."""
