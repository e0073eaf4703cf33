"""The page of `attnswap demo`: pictures, clips and comparisons in a browser. The only part that imports Gradio."""
