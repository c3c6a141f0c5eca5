"""The arithmetic of Hopper's tensor cores as executable text: what every kernel for it is compared with."""
