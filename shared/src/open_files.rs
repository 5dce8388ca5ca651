//! The limit of open files: every connection is one, and systems start programs with a low limit and a high ceiling.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How many files the process may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFiles {
    /// The limit in force; `None` is no limit.
    pub limit: Option<u64>,
    /// How far this process may raise it itself.
    pub ceiling: Option<u64>,
}

impl OpenFiles {
    /// Raises the limit as far as this process may. One that cannot be raised stays as it is.
    pub fn raise() -> OpenFiles {
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let raised = current == maximum || setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok();
        OpenFiles { limit: if raised { maximum } else { current }, ceiling: maximum }
    }

    /// What is missing for `needed` open files, and how to get it; `None` if nothing is.
    pub fn missing(&self, needed: u64) -> Option<String> {
        let limit = self.limit.filter(|limit| *limit < needed)?;
        let ceiling = self.ceiling.map_or_else(|| "none".to_owned(), |ceiling| ceiling.to_string());
        Some(format!(
            "about {needed} open files are needed and {limit} are allowed (hard limit {ceiling}): raise it with `ulimit -Hn {needed}` as \
             root, LimitNOFILE={needed} in a systemd unit, or --ulimit nofile={needed} for a container"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_its_ceiling() {
        let files = OpenFiles::raise();
        assert_eq!(files.limit, files.ceiling, "the kernel lets every process do that");
        assert_eq!(OpenFiles::raise(), files);
    }

    #[test]
    fn what_is_missing_is_told_with_what_helps() {
        let files = OpenFiles { limit: Some(1024), ceiling: Some(4096) };
        assert_eq!(files.missing(1024), None);
        let told = files.missing(40_064).unwrap();
        assert!(told.starts_with("about 40064 open files are needed and 1024 are allowed (hard limit 4096)"), "{told}");
        assert!(told.contains("ulimit -Hn 40064") && told.contains("LimitNOFILE=40064"), "{told}");
        assert_eq!(OpenFiles { limit: None, ceiling: None }.missing(u64::MAX), None);
    }
}
