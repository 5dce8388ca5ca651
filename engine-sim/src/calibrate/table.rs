//! A CSV with a first line of names, read column by column, and errors that say where.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

/// Most rows that are read.
pub const MAX_ROWS: usize = 1 << 20;
/// Largest file that is read, in bytes after decompression.
const MAX_BYTES: u64 = 256 << 20;
/// A million seconds in microseconds, and more tokens than any cache holds.
const MOST: f64 = 1e12;

/// What is wrong with a CSV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsvError {
    source: String,
    line: u64,
    column: String,
    found: String,
    expected: String,
}

impl std::error::Error for CsvError {}

impl fmt::Display for CsvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CsvError { source, line, column, found, expected } = self;
        write!(f, "{source}: line {line}, ")?;
        if !column.is_empty() {
            write!(f, "column {column}: ")?;
        }
        write!(f, "found {found}, expected {expected}")
    }
}

/// The text of a file, or of the file with `.gz` after its name where there is no such file.
///
/// # Errors
/// What the system says, or a file of more than 256 MiB.
pub fn read_text(path: &Path) -> io::Result<String> {
    match std::fs::File::open(path) {
        Ok(file) => bounded(file),
        Err(missing) => {
            let mut packed = path.as_os_str().to_owned();
            packed.push(".gz");
            let file = std::fs::File::open(packed).map_err(|_| missing)?;
            bounded(flate2::read::GzDecoder::new(file))
        }
    }
}

fn bounded(from: impl Read) -> io::Result<String> {
    let mut text = String::new();
    let read = from.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if read as u64 > MAX_BYTES { Err(io::Error::other(format!("more than {MAX_BYTES} bytes"))) } else { Ok(text) }
}

/// The text of a CSV, cut into cells.
#[derive(Debug)]
pub struct Table {
    source: String,
    names: Vec<String>,
    records: Vec<csv::StringRecord>,
}

/// One row of a table.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    table: &'a Table,
    record: &'a csv::StringRecord,
}

impl Table {
    /// Cuts `text`; `source` is what messages call it.
    ///
    /// # Errors
    /// A row that is not as long as the first line, no row at all, or more than [`MAX_ROWS`].
    pub fn read(source: &str, text: &str) -> Result<Table, CsvError> {
        let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(text.as_bytes());
        let mut table = Table { source: source.to_owned(), names: Vec::new(), records: Vec::new() };
        let names = reader.headers().map_err(|e| table.broken(&e))?;
        let names: Vec<String> = names.iter().map(str::to_owned).collect();
        table.names = names;
        for record in reader.records() {
            let record = record.map_err(|e| table.broken(&e))?;
            let line = record.position().map_or(0, csv::Position::line);
            if table.records.len() == MAX_ROWS {
                return Err(table.wrong(line, "", "another row", &format!("at most {MAX_ROWS} rows")));
            }
            if record.len() != table.names.len() {
                let expected = format!("{}, as in the first line", table.names.len());
                return Err(table.wrong(line, "", &format!("{} values", record.len()), &expected));
            }
            table.records.push(record);
        }
        if table.records.is_empty() {
            return Err(table.wrong(2, "", "no row", "at least one"));
        }
        Ok(table)
    }

    /// Checks the first line: only columns that are `allowed`, each once, and all that are `required`.
    ///
    /// # Errors
    /// The first column that is wrong or missing.
    pub fn expect_columns(&self, required: &[&str], allowed: &[&str]) -> Result<(), CsvError> {
        for (i, name) in self.names.iter().enumerate() {
            if !allowed.contains(&name.as_str()) {
                return Err(self.wrong(1, name, "an unknown column", &format!("one of {}", allowed.join(", "))));
            }
            if self.names[..i].contains(name) {
                return Err(self.wrong(1, name, "a second time", "each column once"));
            }
        }
        match required.iter().find(|r| !self.names.iter().any(|n| n == *r)) {
            Some(missing) => {
                Err(self.wrong(1, missing, "no such column", &format!("the columns {}", required.join(", "))))
            }
            None => Ok(()),
        }
    }

    /// The rows.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.records.iter().map(|record| Row { table: self, record })
    }

    fn broken(&self, e: &csv::Error) -> CsvError {
        let line = e.position().map_or(1, csv::Position::line);
        self.wrong(line, "", &format!("{e}"), "a CSV with a first line of names")
    }

    fn wrong(&self, line: u64, column: &str, found: &str, expected: &str) -> CsvError {
        let (found, expected) = (found.to_owned(), expected.to_owned());
        CsvError { source: self.source.clone(), line, column: column.to_owned(), found, expected }
    }
}

impl<'a> Row<'a> {
    /// The text in a column, empty where the table has no such column.
    pub fn text(&self, column: &str) -> &'a str {
        let at = self.table.names.iter().position(|n| n == column);
        at.map_or("", |i| &self.record[i])
    }

    /// The number in a column.
    ///
    /// # Errors
    /// Nothing there, or no number that is finite and not negative.
    pub fn number(&self, column: &str) -> Result<f64, CsvError> {
        match self.number_or_nothing(column)? {
            Some(number) => Ok(number),
            None => Err(self.wrong(column, "nothing", &format!("a number in 0..={MOST:e}"))),
        }
    }

    /// The number in a column; `None` where there is no such column or nothing in it.
    ///
    /// # Errors
    /// Something that is no number, not finite or negative.
    pub fn number_or_nothing(&self, column: &str) -> Result<Option<f64>, CsvError> {
        let text = self.text(column);
        match text.parse::<f64>() {
            _ if text.is_empty() => Ok(None),
            Ok(v) if v.is_finite() && (0.0..=MOST).contains(&v) => Ok(Some(v)),
            Ok(_) | Err(_) => Err(self.wrong(column, &format!("{text:?}"), &format!("a number in 0..={MOST:e}"))),
        }
    }

    /// An error in a column of this row.
    pub fn wrong(&self, column: &str, found: &str, expected: &str) -> CsvError {
        let line = self.record.position().map_or(0, csv::Position::line);
        self.table.wrong(line, column, found, expected)
    }
}
