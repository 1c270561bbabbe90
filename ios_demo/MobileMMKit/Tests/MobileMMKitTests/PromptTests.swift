import XCTest

@testable import MobileMMKit

final class PromptTests: XCTestCase {
    func testTheManifestsExamplesAreRenderedAndTokenizedAsInPython() throws {
        let bundle = try Vectors.bundle.get()
        let (model, prompt) = (bundle.manifest.model, bundle.manifest.prompt)
        let tokenizer = PromptTokenizer(
            try Tokenizer.read(try bundle.file(prompt.tokenizer)), prompt, imageTokenId: model.imageTokenId,
            numImageTokens: model.numImageTokens)
        XCTAssertGreaterThanOrEqual(prompt.examples.count, 3)
        for example in prompt.examples {
            let messages = example.messages.map { message in
                let content = message.objects("content")
                let texts = content.filter { $0.string("type") == "text" }.map { $0.string("text") }
                let images = content.filter { $0.string("type") == "image" }.count
                return Message(role: message.string("role"), text: texts.joined(), images: images)
            }
            assertSame(try render(prompt, messages).joined(separator: "<image>"), example.rendered)
            XCTAssertEqual(try tokenizer.encode(messages), example.inputIds)
        }
    }

    func testRulesOfEveryKindAreRenderedAsInPython() throws {
        for one in try Vectors.object("prompts.json").objects("rendered") {
            let prompt = prompt(one["prompt"]!.object!)
            let messages = one.objects("messages").map {
                Message(role: $0.string("role"), text: $0.string("text"), images: $0.int("images"))
            }
            assertSame(try render(prompt, messages).joined(separator: "<image>"), one.string("rendered"))
        }
    }

    func testPositionsInThreeDimensionsArePythons() throws {
        let one = try Vectors.object("prompts.json")["rope"]!.object!
        let wanted = one["positions"]!.array!.map { $0.array!.map { $0.whole! } }
        XCTAssertEqual(ropePositions(one.ints("ids"), imageTokenId: 9, rows: 2, columns: 3), wanted)
    }

    private func prompt(_ of: JsonObject) -> Prompt {
        func turn(_ key: String) -> Turn {
            let of = of[key]!.object!
            return Turn(
                prefix: of.string("prefix"), suffix: of.string("suffix"),
                prefixBeforeImage: of["prefix_before_image"]?.string, text: of["text"]!.bool!)
        }
        return Prompt(
            tokenizer: "tokenizer.json", begin: of.string("begin"), system: turn("system"), user: turn("user"),
            assistant: turn("assistant"), generation: of.string("generation"), laterUser: turn("later_user"),
            userAfterSystem: turn("user_after_system"), imagePrefix: of.string("image_prefix"),
            imageSuffix: of.string("image_suffix"), strip: of.string("strip"), addBos: of["add_bos"]!.bool!, stop: [],
            examples: [])
    }
}
