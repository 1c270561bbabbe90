import AppIntents
import Foundation
import MobileMMKit

/// "Ask about this picture", for Shortcuts and Siri: one question about one picture, answered offline.
struct AskAboutPicture: AppIntent {
    static let title: LocalizedStringResource = "Ask about this picture"
    static let description = IntentDescription("Answers a question about a picture, on this device alone.")

    @Parameter(title: "Picture")
    var picture: IntentFile

    @Parameter(title: "Question", default: "What is in this picture?")
    var question: String

    init() {}

    func perform() async throws -> some IntentResult & ReturnsValue<String> {
        let model = await AppModel.shared
        await model.start()
        guard let bundle = await model.bundle, let backend = await model.backend else {
            throw MobileMMError("Import a bundle in the app first.")
        }
        let session = try await Session(bundle, backend, sampling: Sampling(maxNewTokens: 128))
        try await session.lookAt(try PictureFile.decode(picture.data))
        return .result(value: try await session.reply(question))
    }
}
