//! Placeholders in commands, environments and URLs: `{port}`, `{engine0}`, `{engines}`, `{receiver}`.
//!
//! A brace that opens none of these names is a mistake, except where nothing inside could be a name (JSON, say): that is text.

/// What placeholders stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// `{port}` and `{port2}`, for processes that the lab starts.
    pub(super) ports: Option<[u16; 2]>,
    /// `{engine0}` and so on: base URLs.
    pub(super) engines: Vec<String>,
    /// `{receiver}`: host and port.
    pub(super) receiver: String,
}

impl Places {
    /// As many as there will be, to check a file with.
    pub(super) fn example(engines: u32) -> Places {
        let engines = (0..engines).map(|_| "http://127.0.0.1:1".to_owned()).collect();
        Places { ports: Some([1, 2]), engines, receiver: "127.0.0.1:1".to_owned() }
    }

    /// The same for a system that the lab does not start.
    pub(super) fn without_ports(self) -> Places {
        Places { ports: None, ..self }
    }

    /// The names there are, in words.
    pub(super) fn allowed(&self) -> String {
        let mut names = vec!["{receiver}".to_owned()];
        if self.ports.is_some() {
            names.extend(["{port}".to_owned(), "{port2}".to_owned()]);
        }
        if let Some(last) = self.engines.len().checked_sub(1) {
            names.push("{engines}".to_owned());
            names.push(if last == 0 { "{engine0}".to_owned() } else { format!("{{engine0}} to {{engine{last}}}") });
        }
        format!("one of {}", names.join(", "))
    }

    fn get(&self, name: &str) -> Option<String> {
        match name {
            "port" => self.ports.map(|[port, _]| port.to_string()),
            "port2" => self.ports.map(|[_, port]| port.to_string()),
            "receiver" => Some(self.receiver.clone()),
            "engines" => (!self.engines.is_empty()).then(|| self.engines.join(",")),
            other => self.engines.get(other.strip_prefix("engine")?.parse::<usize>().ok()?).cloned(),
        }
    }
}

/// Fills in one text.
///
/// # Errors
/// The name of a placeholder that there is none of.
pub(super) fn text(template: &str, places: &Places) -> Result<String, String> {
    let (mut out, mut rest) = (String::new(), template);
    while let Some((before, behind)) = rest.split_once('{') {
        out.push_str(before);
        let name = behind.split_once('}').filter(|(name, _)| is_name(name));
        rest = match name {
            Some((name, behind)) => {
                out.push_str(&places.get(name).ok_or_else(|| name.to_owned())?);
                behind
            }
            None => {
                out.push('{');
                behind
            }
        };
    }
    Ok(out + rest)
}

/// Fills in a command: `{engines}` that stands alone becomes an argument for each engine.
///
/// # Errors
/// As [`text`].
pub(super) fn arguments(templates: &[String], places: &Places) -> Result<Vec<String>, String> {
    let mut out = Vec::with_capacity(templates.len());
    for template in templates {
        if template == "{engines}" && !places.engines.is_empty() {
            out.extend_from_slice(&places.engines);
        } else {
            out.push(text(template, places)?);
        }
    }
    Ok(out)
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        let engines = vec!["http://a:1".to_owned(), "http://b:2".to_owned()];
        Places { ports: Some([70, 71]), engines, receiver: "127.0.0.1:9".to_owned() }
    }

    #[test]
    fn placeholders_are_filled_in_and_other_braces_are_text() {
        let check = |template: &str, expect: Result<&str, &str>| {
            let expect = expect.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(text(template, &places()), expect, "{template}");
        };
        check("http://127.0.0.1:{port}", Ok("http://127.0.0.1:70"));
        check("{port}{port2}", Ok("7071"));
        check("--to={engine1},x", Ok("--to=http://b:2,x"));
        check("all={engines}", Ok("all=http://a:1,http://b:2"));
        check("http://{receiver}/v1/traces", Ok("http://127.0.0.1:9/v1/traces"));
        check("", Ok(""));
        check(r#"{"a": {"port": 1}}"#, Ok(r#"{"a": {"port": 1}}"#));
        check("a { b", Ok("a { b"));
        check("{engine2}", Err("engine2"));
        check("{prot}", Err("prot"));
        assert_eq!(text("{port}", &places().without_ports()), Err("port".to_owned()));
    }

    #[test]
    fn engines_alone_are_an_argument_each() {
        let given = ["--urls", "{engines}", "-p", "{port}"].map(str::to_owned);
        let expect = ["--urls", "http://a:1", "http://b:2", "-p", "70"].map(str::to_owned);
        assert_eq!(arguments(&given, &places()), Ok(expect.to_vec()));
        assert_eq!(arguments(&given, &Places::example(0)), Err("engines".to_owned()));
    }

    #[test]
    fn names_are_told() {
        assert_eq!(places().allowed(), "one of {receiver}, {port}, {port2}, {engines}, {engine0} to {engine1}");
        assert_eq!(Places::example(0).without_ports().allowed(), "one of {receiver}");
    }
}
