"""From a backbone to a label for every pixel: UperNet, and a linear probe of dense features."""
