//! igsim
