//! Fits latency profiles to measured step times, and says how far off they are.
//!
//! [`steps`] reads step times, [`fit`] finds the terms of [`crate::core::latency::StepModel`] with [`nnls`], [`tables`] turns
//! published raw tables into step times. Everything here is a function of its arguments: the same rows give the same profile.

pub mod fit;
pub mod nnls;
pub mod steps;
pub mod table;
pub mod tables;

pub use fit::{Calibration, RegimeReport, calibrate};
pub use steps::{Kind, StepRow, read_steps, write_steps};
