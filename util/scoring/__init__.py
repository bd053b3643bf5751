"""FID and Inception Score of images, and the networks that they rest on."""
