import Foundation
import XCTest

@testable import MobileMMKit

final class TokenizerTests: XCTestCase {
    private func compare(_ name: String, least: Int) throws {
        let tokenizer = try Tokenizer.read(Vectors.file("tokenizers/\(name).tokenizer.json"))
        let cases = try Vectors.objects("tokenizers/\(name).json")
        XCTAssertGreaterThanOrEqual(cases.count, least)
        for one in cases {
            let text = one.string("text")
            XCTAssertEqual(tokenizer.encode(text, special: name == "llama3"), one.ints("ids"), shown(text, most: 500))
            let said = one.ints("said")
            assertSame(tokenizer.decode(said), one.string("decoded"), "\(said)")
            var stream = TextStream({ tokenizer.decoded($0) }, stop: one.strings("stop"))
            let pieces = said.map { stream.put($0) } + [stream.end()]
            XCTAssertEqual(pieces.map(\.scalars), one.strings("pieces").map(\.scalars), "\(said)")
        }
    }

    func testDefaultBundlesIdsAndStreamedTextsArePythons() throws { try compare("default", least: 1000) }

    func testThoseOfLlama3sKindAre() throws { try compare("llama3", least: 250) }

    func testThoseOfLlamasKindAre() throws { try compare("llama", least: 250) }

    func testThoseWithAMetaspaceAre() throws { try compare("metaspace", least: 250) }

    func testThoseWithTheIdsOfSentencePieceAre() throws { try compare("sentencepiece", least: 250) }

    func testThoseOfGemmasKindAre() throws { try compare("gemma", least: 250) }

    func testAPlaceholderInSomebodysWordsIsText() throws {
        let tokenizer = try Tokenizer.read(Vectors.file("tokenizers/default.tokenizer.json"))
        XCTAssertEqual(tokenizer.encode("<|im_end|>"), [2])
        XCTAssertGreaterThan(try tokenizer.without(2).encode("<|im_end|>").count, 1)
    }

    func testWhatIsNotKnownIsRefusedByName() throws {
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).json")
        defer { try? FileManager.default.removeItem(at: file) }
        for (text, word) in [
            ("{}", "'model'"),
            (#"{"model": {"type": "Unigram"}}"#, "Unigram"),
            (
                #"{"model": {"type": "BPE", "vocab": {}, "merges": []}, "normalizer": {"type": "BertNormalizer"}}"#,
                "BertNormalizer"
            ),
            (#"{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}"#, "vocab"),
            (#"{"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a b c"]}}"#, "merge"),
            ("[", "JSON"),
        ] {
            try Data(text.utf8).write(to: file)
            let error = failure { try Tokenizer.read(file) }
            assertOneLine(error, file.path)
            XCTAssertTrue("\(error!)".contains(word), "\(text): \(error!)")
        }
    }

    func testTextsThatLookAlikeAreNotOne() throws {
        // "é" in one code point and in two: other ids, as in Python.
        let vocabulary = #"{"\u00e9": 0, "e\u0301": 1, "e": 2, "\u0301": 3}"#
        let json = #"{"model": {"type": "BPE", "merges": [["e", "\u0301"]], "vocab": "# + vocabulary + "}}"
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).json")
        defer { try? FileManager.default.removeItem(at: file) }
        try Data(json.utf8).write(to: file)
        let tokenizer = try Tokenizer.read(file)
        XCTAssertEqual(tokenizer.encode("\u{E9}"), [0])
        XCTAssertEqual(tokenizer.encode("e\u{301}"), [1])
    }
}
